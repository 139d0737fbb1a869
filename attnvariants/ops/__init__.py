"""Public functions: validation, selection of the implementation, operators and autograd."""
