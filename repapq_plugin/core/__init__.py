"""What everything else is made of: numerics, tensors, modules, hooks, files; no host."""
