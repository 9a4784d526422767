"""Flows and the command line: what users run, joining pipelines and model."""
