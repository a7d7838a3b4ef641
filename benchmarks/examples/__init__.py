"""The operators in models that people use. Each file is a command."""
