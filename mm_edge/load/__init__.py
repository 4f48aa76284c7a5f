"""Reads models, weights and data: the only room that opens what users give."""
