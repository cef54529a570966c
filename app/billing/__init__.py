"""What it costs: price books, holds, balances and the ledger."""
