"""The torch.library ops, one per file, each with its checks, fake, derivatives and public function."""
