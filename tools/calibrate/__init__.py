"""``macs calibrate``: which expert serves which modality."""
