"""Nonlinear functions by few-spikes neurons."""
