"""Images to URLs: encoding, provenance, upload and presigning; and the record of each prediction beside its images.

It knows Pillow and S3. Where images come from, and who asked for them, it does not know.
"""
