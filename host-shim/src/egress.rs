//! stub
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
/// p
#[derive(Clone)]
pub struct Policy;
impl Policy {
    /// n
    pub fn new(_p: Vec<crate::config::Cidr>) -> Self { Self }
}
/// c
pub struct EgressContext;
impl EgressContext {
    /// n
    pub fn new(_p: Policy) -> Self { Self }
}
/// s
pub async fn serve<S>(_s: S, _c: Arc<EgressContext>, _t: CancellationToken) {}
