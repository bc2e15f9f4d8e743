"""ISMRMRD files, simulation, and pictures."""
