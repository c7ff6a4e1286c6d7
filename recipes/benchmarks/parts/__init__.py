"""Code that the benchmarks share: models, methods, clocks, counters, tables and charts."""
