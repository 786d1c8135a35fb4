"""Past one machine: replicas of `kiln serve` behind Ray Serve, a container file, a systemd unit. docs/SCALE.md says how."""
