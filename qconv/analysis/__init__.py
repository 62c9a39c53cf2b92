"""Commands beside `quantize`: evaluate, compare, diagnose, inspect, sweeps and sample studies."""
