"""The checkpoint format: dtypes, headers, indexes, sidecars, manifest. Pure: no torch, no ray, no I/O."""
