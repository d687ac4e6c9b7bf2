"""What is done to a merged float network before anything is quantized; it goes on computing what it did."""
