"""Repositories for Triton Inference Server: written, linted, served and tried."""
