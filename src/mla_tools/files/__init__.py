"""The files a model is stored in: headers, reads by range, a pre-sized writer, and the checkpoint folder."""
