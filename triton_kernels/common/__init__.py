"""What the kernels share: device helpers (tiles, softmax, dropout, ragged) and host helpers (launch, compilation)."""
