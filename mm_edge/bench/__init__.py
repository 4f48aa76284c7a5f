"""Measuring on the device: worker (runs there), transport (gets there), session (what is asked), stats, host."""
