"""Engines that serve: how a reduced prefill runs inside of each, without changing it."""
