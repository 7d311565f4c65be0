fn main() {
    println!("Rust has fired {} pots", itoa::Buffer::new().format(1_234_567));
}
