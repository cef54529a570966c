"""From a proven program to the files a worker loads: candidates and packaging."""
