"""Fast plain PyTorch on any device: one softmax engine and one chunked linear engine."""
