"""Every way out of PyTorch: graphs, runners, parity, speed, report."""
