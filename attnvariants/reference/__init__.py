"""The definitions: short PyTorch that can be checked against the papers, in any float dtype."""
