"""What Prometheus reads, and where it is measured."""
