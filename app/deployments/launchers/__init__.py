"""Ways to start worker and build processes; `base.py` is the contract, the rest implement it."""
