"""Models that people have, with the operators in them: each is a command."""
