"""Images to URLs: encoding, the provenance each image carries, upload and presigning.

It knows Pillow and S3. Where images come from, and who asked for them, it does not know.
"""
