"""What is written for a device."""
