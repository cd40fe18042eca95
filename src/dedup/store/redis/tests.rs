use super::target::Address;
