// Tells a CPU build of torch that there is one GPU, "cuda:0", with one stream, on which all is done
// at once. Tensors that are said to lie there are pretend_gpu.py's affair.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
    Device gpu() const { return Device(DeviceType::CUDA, 0); }
    DeviceType type() const override { return DeviceType::CUDA; }
    Device exchangeDevice(Device) const override { return gpu(); }
    Device getDevice() const override { return gpu(); }
    void setDevice(Device) const override {}
    void uncheckedSetDevice(Device) const noexcept override {}
    DeviceIndex deviceCount() const noexcept override { return 1; }
    Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu()); }
    Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, gpu()); }
    Stream exchangeStream(Stream) const noexcept override { return getStream(gpu()); }
    bool queryStream(const Stream&) const override { return true; }
    void synchronizeStream(const Stream&) const override {}
    void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

struct Hooks : at::CUDAHooksInterface {
    Hooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    int getNumGPUs() const override { return 1; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
};

Guard guard;
bool registered =
    (c10::impl::device_guard_impl_registry[size_t(DeviceType::CUDA)].store(&guard), true);

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks)
}
