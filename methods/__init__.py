"""Parts of the methods that their trainers' main idea does not need in sight."""
