//! Caravan on the wire: the .proto files, the gRPC stubs, and checked conversions to and from the types.
