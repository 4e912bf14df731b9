"""What programs of bench/ are made of: scaling.py, distillation.py, host_cost.py."""
