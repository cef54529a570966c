"""What was used: usage events, the write-ahead journal, receipts and sums over both."""
