"""What a device can do: profiles, and the probe that measures one."""
