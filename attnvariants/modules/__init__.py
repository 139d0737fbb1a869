"""Drop-in ``torch.nn.Module`` layers."""
