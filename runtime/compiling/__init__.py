"""From a proven program to the files a worker loads: forms and packaging."""
