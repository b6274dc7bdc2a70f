"""What prepare_data.py does: the sample set, FER2013, cropping photos to faces, auditing a folder."""
