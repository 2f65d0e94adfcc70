"""Engines within other tools."""
