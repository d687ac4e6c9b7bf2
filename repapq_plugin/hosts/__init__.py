"""One package per host toolbox, and what they share; only the command line imports a host, and no host another."""
