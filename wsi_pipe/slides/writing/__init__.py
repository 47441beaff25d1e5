"""Writing pyramidal TIFFs and DICOM, for synthetic slides and tests."""
