"""FPA in other people's training loops: programs to copy from, each run by a test."""
