"""What can be called: one torch.library op per file, its checks, fake, autograd and public function."""
