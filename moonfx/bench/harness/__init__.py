"""What all benchmarks share: timing, memory, types of arguments, tables put into pages."""
