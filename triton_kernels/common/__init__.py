"""What the kernels share: tiles, softmax, dropout and ragged batches on the device; launches on the host."""
