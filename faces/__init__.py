"""Faces in photos, videos and camera frames: finding, cropping, drawing."""
