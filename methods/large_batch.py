"""Large batches for train_simclr.py: the loss in two passes (--chunk)."""

import torch


def two_pass(embed, networks, ddp_networks, x, autocast, chunk, loss):
    """The loss of all views at once and its gradients, in the memory of one chunk of views.

    Adding up the losses of small batches would not do: a view's negatives are the whole batch. But
    the loss needs only z of each view (Gao et al. 2021, GradCache). So z is made without a graph,
    and loss(z).backward() gives dL/dz; then each chunk is embedded again, with a graph, and its
    rows of dL/dz are propagated back. Batch-norm normalises each chunk by itself, in both passes
    alike; its running statistics are updated in the second.

    embed(encoder, head, x, autocast) -> z; networks: encoder and head; ddp_networks: the same in
    DDP, which averages gradients once, in the last chunk's backward pass. x (2N, 3, S, S); chunk:
    views. Returns z (2N, D) and the loss.
    """
    buffers = [buffer for network in networks for buffer in network.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        z = torch.cat([embed(*networks, part, autocast) for part in x.split(chunk)])
        for buffer, old in zip(buffers, before):
            buffer.copy_(old)
    z.requires_grad_()
    value = loss(z)
    value.backward()
    *others, (last, dz_last) = zip(x.split(chunk), z.grad.split(chunk))
    for part, dz in others:                                  # the parameters' gradients add up
        embed(*networks, part, autocast).backward(dz) 
    embed(*ddp_networks, last, autocast).backward(dz_last)
    return z, value
