"""Labelled rows from files and data sets, split and mapped to the nodes of a taxonomy."""
