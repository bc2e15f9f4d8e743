"""Gadgetron XML configurations, shipped as package data."""
