"""One package or file per host toolbox; nothing else of the plugin imports a host, and no host another."""
