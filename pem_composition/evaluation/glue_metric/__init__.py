"""The GLUE metrics as a local ``evaluate`` module; see ``glue_metric.py``."""
